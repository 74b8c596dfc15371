"""Images from where they are to batches of tensors: sources, the object store, published data sets, figures."""
