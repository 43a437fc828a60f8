"""The documentation: pages, and what builds and tests them (``mkdocs.yml``, ``tests/docs/``)."""
