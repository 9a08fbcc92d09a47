import torch

from homebrew.training.cuda_graph import CudaGraph


def test_it_is_captured_when_all_is_as_before_and_anew_when_something_differs(device, captured):
    held = [torch.ones(3, device=device), 2.0]
    graph = CudaGraph(lambda x: held[0] * held[1] + x, lambda: held)
    results = []

    def call(*values):
        for value in values:
            results.append(graph(torch.full((3,), value, device=device)))
            assert torch.equal(results[-1], held[0] * held[1] + value)
        return len(captured)

    assert call(1.0) == 0
    assert call(2.0, 3.0, 4.0) == 1
    held[1] = 5.0  # a number that the graph has in it
    assert call(5.0) == 1
    assert call(6.0, 7.0) == 2
    held[0] = torch.full((3,), 9.0, device=device)  # a tensor that lies elsewhere
    assert call(8.0) == 2
    assert call(9.0) == 3
    held[0].fill_(4.0)  # and one that does not
    assert call(10.0) == 3
    assert [float(result[0]) for result in results[:4]] == [3.0, 4.0, 5.0, 6.0]  # each in memory of its own


def test_an_input_of_another_shape_is_not_put_into_the_old_ones_place(device, captured):
    graph = CudaGraph(lambda x: x + 1, list)
    for shape in [(3,), (3,), (1,), (1,), (1,)]:
        assert torch.equal(graph(torch.ones(shape, device=device)), torch.full(shape, 2.0, device=device))
    assert len(captured) == 2
