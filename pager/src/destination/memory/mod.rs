//! The guest's memory on the destination: prepared, filled, mapped.

pub mod claim;
pub mod collapse;
pub mod huge_page_policy;
pub mod huge_page_staging;
pub mod installer;
pub mod preallocate;
pub mod receive_mapping;
pub mod vmm_mappings;
