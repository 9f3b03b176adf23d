"""What a line does, one file per task, each named as the task and found by listing the folder."""
