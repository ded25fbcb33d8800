"""Generation engines in processes of their own."""
