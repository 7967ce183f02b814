"""The parts of a comparison that no framework is needed for: phases, tables, pictures and the report."""
