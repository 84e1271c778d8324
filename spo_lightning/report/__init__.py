"""Files of finished runs in, tables out. Reads run directories and nothing else of ours."""
