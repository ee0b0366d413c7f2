"""Everything to try the project on one machine: street scenes in the Open Images layout, and an S3 server."""
