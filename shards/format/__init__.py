"""What lies on disk: the index of a tar, manifests, token files, the records of views."""
