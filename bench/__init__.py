"""What the layer costs: modelled, compiled, and measured on a CPU or a GPU.

``make bench`` is the CPU's, ``python -m bench --help`` lists the rest::

    cases        the cases, and the order they go in
    roofline     what each schedule must cost, from code
    setups       layers whose launches are all that ship
    aot          these, compiled ahead of time, without a GPU
    parity       every schedule in Triton's interpreter, against float64
    peers        what a user would pick instead of our layer
    candidates   our layer under each schedule and its peers, and their check
    device       timing, ceilings and description of a GPU
    kernels      the candidates on a GPU: checked, then timed
    model        a whole model: training step and decoding
    memory       a training step's peak and time beside PEFT, each in its own process
    memory_worker  one such process
    host         the host's time of a layer's call, with a GPU or without
    host_worker  the calls of one tree, in a process of its own
    standin      a GPU that is not there: launches are counted, not made
    worker       how such processes are spoken to
    tune         a search over tiles for the GPU at hand
    plots        of the kernels' table
    report       a table as JSON and Markdown
    measure      interleaved CPU timing, saved bytes
    test_layer   the layer on a CPU
    test_step    a training step of the built-in base on a CPU
    overhead     a federated round beside its clients' own work
    kill_resume  runs that are killed and resumed
"""
