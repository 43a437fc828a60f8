"""What passes and backends know of a graph: layers and their records, calls of operators, shapes, tracing."""
