"""The model again, as it computes one new token: in half the operations, and on a GPU as one recorded graph."""
