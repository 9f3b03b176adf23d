"""What is done with the reports of a host (`serving.host.observing`): logs, metrics, traces."""
