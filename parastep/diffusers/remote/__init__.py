"""Followers in other processes: workers of our own, and the ranks of a process group."""
