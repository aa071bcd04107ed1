"""Samplers read off as numbers: the sampling programs that guesses are made with."""
