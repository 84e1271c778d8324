"""What steps and runs cost, in time and memory: one file per question, chosen by ``what``."""
