"""`mosel bench load`: open-loop load on a gateway, one rate after another, and a report in the shape of ghz's."""
