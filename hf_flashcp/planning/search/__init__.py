"""Strategy "search": plans with little KV on the wire, spread evenly over the ranks, under the caps."""
