"""Memory at test time: labelled slices that resemble the query, and what they say of its classes (the idea of RAG-SAM, made to run)."""
