"""The steps of each call, in their order, under the lock: one verb a file; `steps` has what they share.

State is in the kernel alone. Between reading and writing it a verb holds the lock; a write is one transaction, so a
call that is killed at any point leaves all of its rules or none.
"""
