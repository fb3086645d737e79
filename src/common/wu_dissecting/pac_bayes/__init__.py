"""PAC-Bayes bounds for stochastic networks (Wu et al. 2022, Section 6, App H): one module an idea.

``bound``: what bounds the error, and with which probability. ``bases``: in which bases the weights are written.
``posterior``: the Gaussians over them, and networks drawn from them. ``optimize``: how their bounds are made small.
"""
