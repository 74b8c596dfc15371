"""Images in archives and folders: what they hold, which classes and splits, and their pixels."""
