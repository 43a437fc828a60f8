"""Backends: leaves that turn a lowered graph into running code. None of them imports another."""
