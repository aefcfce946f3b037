"""The composition roots: every user command, from its declaration to its implementation.

With tasks.py the only importer of both halves: image (makes and boots guests) and agent.client (talks to their agents).

    catalogue/   the declarations: name, options, defaults, examples
    parse.py usage.py completion.py manpage.py    read them
    vm.py container.py image.py snapshot.py host.py    do the work, one file a family
    main.py      from argv to an exit status
"""
