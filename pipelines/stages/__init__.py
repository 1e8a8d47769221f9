"""One module a stage kind; each turns a config and input artifacts into the files of one artifact."""
