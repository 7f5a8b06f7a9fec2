"""The robust encoder, its trunk and the clean encoder."""
