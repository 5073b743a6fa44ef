"""Did it forget, did it keep."""
