"""What `fleet up` runs on its own: the lock of the data folder and the child processes that hold it."""
