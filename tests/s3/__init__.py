"""S3: one suite on two servers, the embedded server itself, and the way to both."""
