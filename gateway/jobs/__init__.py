"""The life of a job in the gateway: check, admit, store, submit, answer."""
