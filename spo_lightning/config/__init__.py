"""What a key of the command line may be.

In comes the composed configuration and what the command line said of it; out comes nothing, or one
line that refuses a key and says why. ``build`` makes the objects that a node describes. This room
reads keys only: it may not know of a model, of data, or of what a run does with a value.
"""
