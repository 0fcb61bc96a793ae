"""
GPUs pretended on a CPU, as far as device selection and CUDA graphs need them. Tensors stay on the CPU.

A kernel runs on the current stream of its tensors' GPU, whichever GPU is current. A capture records what runs on its
own stream and nothing else, so a stream of the wrong GPU leaves the graph empty. Whatever opens a CUDA context on a GPU
is recorded in `contexts`.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


class FakeCuda(TorchFunctionMode):
    """Inside this context, and with `install`, there are GPUs of these compute capabilities (the major number)."""

    def __init__(self, *majors):
        super().__init__()
        self.majors, self.current, self.contexts, self.capturing = majors, 0, set(), None
        self.streams = [Stream(self, index) for index in range(len(majors))]
        self.contexts.clear()
        self.kept_stream = None  # torch.cuda.graph keeps the one that it makes for its first capture

    def install(self, monkeypatch):
        """Replace what torch.cuda asks the driver. What it computes from the answers is PyTorch's own code."""
        fakes = dict(
            is_available=lambda: bool(self.majors),
            device_count=lambda: len(self.majors),
            current_device=lambda: self.current,
            set_device=self.set_device,
            device=self.device,
            get_device_properties=lambda device: SimpleNamespace(major=self.majors[self.index(device)]),
            _check_bf16_tensor_supported=lambda device: True,  # by emulation, on every GPU
            Stream=lambda device=None: Stream(self, self.index(device)),
            current_stream=lambda device=None: self.streams[self.index(device)],
            stream=self.stream,
            CUDAGraph=Graph,
            graph=self.graph,
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.version, 'hip', None)
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get('device') is not None and torch.device(kwargs['device']).type == 'cuda':
            self.contexts.add(self.index(kwargs['device']))
            kwargs['device'] = 'cpu'
        return function(*args, **kwargs)

    def index(self, device):
        """The number of a GPU named by a str, an int or a torch.device; without a number the current one."""
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    def set_device(self, device):
        self.current = self.index(device)
        self.contexts.add(self.current)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, self.index(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(stream.index):
            before, self.streams[stream.index] = self.streams[stream.index], stream
            yield
            self.streams[stream.index] = before

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        if stream is None:
            stream = self.kept_stream = self.kept_stream or Stream(self, self.current)
        with self.stream(stream):
            self.capturing = graph, stream
            yield
            self.capturing = None

    def launch(self, device, kernel):
        """Run kernel(), which returns a tensor, as one whose tensors are on the GPU `device`."""
        out = kernel()
        if self.capturing and self.streams[self.index(device)] is self.capturing[1]:
            self.capturing[0].kernels.append((kernel, out))
        return out


class Stream:
    def __init__(self, cuda, index):
        self.index = index
        cuda.contexts.add(index)

    def wait_stream(self, other):
        assert self.index == other.index


class Graph:
    def __init__(self):
        self.kernels = []

    def replay(self):
        for kernel, out in self.kernels:
            out.copy_(kernel())
