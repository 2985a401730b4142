"""Strategy "search": little KV on the wire, spread over the ranks, under the caps."""
