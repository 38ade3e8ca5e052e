"""What a search is made of, whatever is searched: proposals, what they are judged by, and what is remembered of them."""
