"""Why a name leads where it does, and what is wrong with what is installed."""
