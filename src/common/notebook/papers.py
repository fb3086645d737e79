"""The four papers: how they are cited, and where they are."""

PAPERS = {
    "dong_quantifying": "Dong, Zhang, Yao, Sun (2025), Towards Quantifying the Hessian Structure of Neural Networks",
    "liao_eigenspectra": "Liao, Mahoney (2021), Hessian Eigenspectra of More Realistic Nonlinear Models",
    "wu_dissecting": "Wu, Zhu, Wu, Wang, Ge (2022), Dissecting Hessian: Understanding Common Structure of Hessian "
    "in Neural Networks",
    "li_adaptive": "Li, Neural Network as Complex Adaptive System and Its Emergent Benign Loss Landscape",
}
#: arXiv's numbers; of the last paper none is known to us.
ARXIV = {"dong_quantifying": "2505.02809", "liao_eigenspectra": "2103.01519", "wu_dissecting": "2010.04261"}


def link(paper: str) -> str:
    """Address of a paper on arXiv; empty if it is not known to be there."""
    return f"https://arxiv.org/abs/{ARXIV[paper]}" if paper in ARXIV else ""
