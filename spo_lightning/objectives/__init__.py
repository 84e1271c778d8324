"""Every objective of ``conf/loss``: its yaml and its function in, a page of all of them out."""
