"""What each call does, in which order, under the lock: one verb a file; `steps` and `conflicts` have what they share.

State is in the kernel alone. Between reading and writing it a verb holds the lock; a write is one transaction, so a
call that is killed at any instant leaves all of it or nothing.
"""
