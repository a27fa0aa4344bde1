"""Look at a job before it runs and at what it published afterwards; nothing here changes a file."""
