"""Generated from protos/mosel/v1 by `make protos`; never edited by hand."""
