"""Named axes, communicators and the records of the replicas to pool statistics over."""
