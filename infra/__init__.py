"""Where Ganymede runs and how it is started: the command line, the local platform, job submission."""
