// gert::Shape. Where CANN reads or writes past the dimensions in silence, this throws: the caller forgot a check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace gert {

class Shape {
 public:
  static constexpr size_t kMaxDimNum = 25;

  Shape() = default;
  Shape(const std::initializer_list<int64_t>& dims) {
    for (const int64_t dim : dims) AppendDim(dim);
  }
  bool operator==(const Shape& other) const {
    if (dim_num_ != other.dim_num_) return false;
    for (size_t i = 0; i < dim_num_; i++)
      if (dims_[i] != other.dims_[i]) return false;
    return true;
  }
  bool operator!=(const Shape& other) const { return !(*this == other); }
  int64_t GetShapeSize() const {
    int64_t size = 1;
    for (size_t i = 0; i < dim_num_; i++) {
      if (__builtin_mul_overflow(size, dims_[i], &size)) return INT64_MIN;
    }
    return size;
  }
  bool IsScalar() const { return dim_num_ == 0; }
  void SetScalar() { dim_num_ = 0; }
  size_t GetDimNum() const { return dim_num_; }
  void SetDimNum(size_t dim_num) {
    if (dim_num > kMaxDimNum) throw std::out_of_range("Shape::SetDimNum(" + std::to_string(dim_num) + "): at most 25");
    for (size_t i = dim_num_; i < dim_num; i++) dims_[i] = 0;
    dim_num_ = dim_num;
  }
  int64_t GetDim(size_t index) const { return dims_[Checked(index)]; }
  const int64_t& operator[](size_t index) const { return dims_[Checked(index)]; }
  int64_t& operator[](size_t index) { return dims_[Checked(index)]; }
  void SetDim(size_t index, int64_t dim) { dims_[Checked(index)] = dim; }
  Shape& AppendDim(int64_t dim) {
    SetDimNum(dim_num_ + 1);
    dims_[dim_num_ - 1] = dim;
    return *this;
  }

 private:
  size_t Checked(size_t index) const {
    if (index >= dim_num_) {
      throw std::out_of_range("dimension " + std::to_string(index) + " of a shape with " + std::to_string(dim_num_) +
                              ": check GetDimNum first (SetDimNum before SetDim)");
    }
    return index;
  }
  size_t dim_num_ = 0;
  int64_t dims_[kMaxDimNum] = {};
};

}  // namespace gert
