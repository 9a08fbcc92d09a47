"""Operations of the model: attention, MLP, loss and Triton kernels."""
