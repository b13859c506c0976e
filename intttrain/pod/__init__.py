"""Processes that live and die together: their start, what they agree on, and how all end when one does.

The only room that reads environment variables and the process index, and that touches private names of JAX.
"""
