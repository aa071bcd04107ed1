"""Teams: one evaluation, several devices. The head runs the loop, helpers serve it with forwards.

`team` answers the head's calls and decides how each is shared out: `cutting` for a batch, with
`trials` of how it can be cut, `foretelling` for several calls a step. `crew` is who serves, and
what became of them; `helpers` is what serves in this process, `likeness` whether they still compute
what the head does. `together` is the head of a denoiser that is split over processes already.
"""
