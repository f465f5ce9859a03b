"""Whether the machines of a run are well: the links between ranks at its start, the pace of each rank and its signs of life."""
