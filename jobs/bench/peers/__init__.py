"""Other engines that run the same workloads, each in a process (and often an environment) of its own."""
