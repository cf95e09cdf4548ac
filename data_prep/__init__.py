"""Text to shards: readers, tokenising, packing, the HDF5 layout."""
