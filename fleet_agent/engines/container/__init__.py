"""`container`: training and custom jobs, each a container run under the same rules as a deploy."""
