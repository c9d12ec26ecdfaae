"""patchify: bytes of images to normalised patches, those that are wanted."""
