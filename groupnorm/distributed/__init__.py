"""What statistics are pooled over: named axes and communicators, and the records of replicas."""
