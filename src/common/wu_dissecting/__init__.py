"""Wu, Zhu, Wu, Wang, Ge (2022), Dissecting Hessian: Understanding Common Structure of Hessian in Neural Networks."""
