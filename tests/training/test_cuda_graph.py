import torch

from homebrew.training.cuda_graph import CudaGraph


def test_captures_once_dependencies_are_stable_and_again_when_one_changes(device, captured):
    dependencies = [torch.ones(3, device=device), 2.0]
    graph = CudaGraph(lambda x: dependencies[0] * dependencies[1] + x, lambda: dependencies)
    results = []

    def num_captured_after(*values):
        for value in values:
            results.append(graph(torch.full((3,), value, device=device)))
            assert torch.equal(results[-1], dependencies[0] * dependencies[1] + value)
        return len(captured)

    assert num_captured_after(1.0) == 0
    assert num_captured_after(2.0, 3.0, 4.0) == 1
    dependencies[1] = 5.0  # a graph contains the number itself
    assert num_captured_after(5.0) == 1
    assert num_captured_after(6.0, 7.0) == 2
    dependencies[0] = torch.full((3,), 9.0, device=device)  # at another address
    assert num_captured_after(8.0) == 2
    assert num_captured_after(9.0) == 3
    dependencies[0].fill_(4.0)  # in place: no new capture
    assert num_captured_after(10.0) == 3
    assert [float(result[0]) for result in results[:4]] == [3.0, 4.0, 5.0, 6.0]  # replays do not overwrite results


def test_captures_again_for_inputs_of_another_shape(device, captured):
    graph = CudaGraph(lambda x: x + 1, list)
    for shape in [(3,), (3,), (1,), (1,), (1,)]:
        assert torch.equal(graph(torch.ones(shape, device=device)), torch.full(shape, 2.0, device=device))
    assert len(captured) == 2
