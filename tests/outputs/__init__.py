"""Outputs between the disk, the bucket and the gallery: on a real S3 server and a real store."""
